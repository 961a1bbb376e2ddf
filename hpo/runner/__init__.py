"""A study that runs: prepared, tried out, trained by workers, refitted and exported."""
