"""Where runs are logged: the tracker's contract, the outbox, and MLflow."""
