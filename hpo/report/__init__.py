"""What a study has found, read from its storage: for notebooks and reports. No code of an objective runs."""
