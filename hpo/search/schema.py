"""Every key that hpo stores with a study or a trial in Optuna's storage. Nothing else of hpo's stands there.

The strings are a format: studies that were stored by an earlier version must be read, so none of them ever changes its
meaning. In code the budget's `place` is called a slot.
"""

# Attributes of the study (`user_attrs`).

IDENTITY = "hpo:identity"
"""What must not change while a study is resumed (`hpo.search.identity.identity`)."""
MAKING = "hpo:making"
"""A random text that tells this study from another one of its name, made before or in another storage."""
DATA = "hpo:data"
"""The fingerprint of the study's data."""
NAMES = "hpo:names"
"""The fingerprint of what the data's columns, categories and classes are called."""
CODE = "hpo:code"
"""The fingerprint of the source of the study's objective, as it was trained last."""
CODES = "hpo:codes"
"""All such fingerprints that the study was trained with: a list, of which each has `since` (seconds since 1970) and
`code` (`hpo.search.codes`)."""
HELD = "hpo:held"
"""Digests of the values that the study's objective holds, by their names, where a program gave it; else none."""
HELD_BY_FILE = "hpo:held_by_file"
"""Such digests where the study file names the objective: they differ where environment or machine does."""
STUDY_FILE = "hpo:study_file"
"""The study file as JSON, for workers that have none."""
TIMED_OUT = "hpo:timed_out"
"""The `timeout` or the `time`, in seconds, that has ended the study."""
ENDS = "hpo:ends"
"""When a study that has a `time` is to end, in seconds since 1970."""
STOPPED = "hpo:stopped"
"""What has ended the search before its budget was spent (`hpo.search.stop.Stopped`); None: that holds no more."""
PRUNER = "hpo:pruner"
"""What was chosen where the study file names no pruner, or says `cohorts: auto`: `name` and `cohorts`."""
MADE_WITH = "hpo:made_with"
"""What the study was run with: a list, of which each has `since` (seconds since 1970), `versions`, `commit` (of git),
`user` and `device`."""
NOTE = "hpo:note"
"""The version of the study's note that was written last (`hpo.search.notes`)."""
STACK = "hpo:stack"
"""What `stack: auto` has chosen, why, and on which machine."""
STACK_PATHS = "hpo:stack_paths"
"""How the steps of the study's stacks have run (captured, compiled, replayed from a CUDA graph), and why not faster."""
RESULT = "hpo:result"
"""The outcome of the refit: the trial's `number`, its `test` metrics, the `bundle`'s folder, its `parity`; over
`seeds`, where there were several, of how many `networks` it is, and beside which `baselines` and which default
configuration it stands (`hpo.search.beside`)."""
TEST_EVALUATIONS = "hpo:test_evaluations"
"""Each reading of the test set: the trial's `number`, and its `test` metrics."""
CONFIRMED = "hpo:confirmed"
"""What the best configurations came to with fresh seeds, and between which of them was chosen
(`hpo.search.confirmed`)."""
TRACKED = "hpo:tracked"
"""Where the study is tracked, the `state` of its run, and how many `trials` had finished then."""

OWN_RUNS = "hpo:own_runs"
"""True: all runs of the study in the tracker have its making, so that none of an older version is its own."""

# Attributes of the study that Optuna's own code does not show as the user's (`system_attrs`).

WORKER_LEASE = "hpo:lease:"
"""With a lease's id behind it: until when that worker's trials are its own unless it is renewed, in seconds since 1970
by the worker's clock (`hpo.search.lease`)."""

OPENED = "hpo:opened:"
"""With a lease's id behind it: the process that has opened the study to train it, before it has its first trial."""

# Attributes of a trial (`user_attrs`).

SLOT = "place"
"""The slot of the budget that the trial was queued for: an int, from 0."""
SEED = "seed"
"""The seed of its weights and batches; its successors have the same."""
START_WITH = "start_with"
"""The index of the `start_with` entry that it was queued with."""
RETRY_OF = "retry_of"
"""The number of the trial that it succeeds."""
ATTEMPT = "attempt"
"""Which attempt it is, from 1; an interruption costs none."""
LINEAGE = "lineage"
"""The number of the first trial that had its params and seed."""
WITHDRAWN = "withdrawn"
"""True where the budget had no slot for it: it was ended before anybody claimed it."""
ERROR = "error"
"""Why it failed, or was ended."""
BEST_EPOCH = "best_epoch"
"""The epoch, from 0, whose value is the trial's."""
METRICS = "metrics"
"""All metrics of that epoch, by name."""
N_PARAMETERS = "n_parameters"
"""How many its network has."""
JOINED = "joined"
"""The round of its stack, from 0, in which it started, where that is not the first: it had that round's batches."""
ROUNDS = "rounds"
"""The round whose batches each of its epochs had, where they do not follow each other: it was resumed in a stack."""
PAUSED_AT = "paused_at"
"""After how many epochs it was paused last (`hpo.search.halving`); it may have been resumed since."""
TRAINED = "trained"
"""From when until when it was trained before it was paused: lists of two, in seconds since 1970."""
SECONDS = "trained_seconds"
"""For how long it was trained since it was claimed last, by the monotonic clock, where the date was set meanwhile."""
RESTARTED = "restarted"
"""How often it was resumed from scratch, since its checkpoint could not be reached."""
RUN_ID = "mlflow_run_id"
"""The id of its run in MLflow."""
ADOPTED = "hpo:adopted"
"""`study#number` of the trial of another study that it is: history for the sampler, no trial of the budget."""
CURVES = "curves"
"""Its metrics by name, each a list with one number an epoch (`hpo.search.curves`)."""
CONSTRAINED = "constrained"
"""The values of what the study constrains, by name, as far as they are known; a latency is in milliseconds."""

# Attributes of a trial that Optuna's own code does not show as the user's (`system_attrs`).

LEASE = "hpo:lease"
"""Who trains a running trial: LEASE_WORKER, LEASE_ID, LEASE_ATTEMPT (`hpo.search.lease`)."""
LEASE_WORKER = "worker"
"""The process that trains it (`hpo.processes.this_process`)."""
LEASE_ID = "lease"
"""The id of its worker's lease (WORKER_LEASE)."""
LEASE_UNTIL = "until"
"""Until when the trial was held, once it was ended by somebody else: seconds since 1970 by the worker's clock. In a
trial that an older version left running, until when it is held: it had a lease of its own."""
LEASE_ATTEMPT = "attempt"
"""Which attempt it is, as ATTEMPT."""

# Optuna's own attributes of a trial that hpo reads or hands on (`system_attrs`).

CONSTRAINT = "constraints:"
"""With a constraint's name behind it: by how much the trial breaks it, as a part of the bound; 0 or less: it holds."""
FIXED_PARAMS = "fixed_params"
"""The params that a trial was queued with; those that are missing are sampled."""
GRID_ID = "grid_id"
"""Which configuration of the grid it is."""
SEARCH_SPACE = "search_space"
"""The grid that GRID_ID counts in."""
X_FOR_TELL = "x_for_tell"
"""CMA-ES with margin: the point before it was rounded to a step."""
