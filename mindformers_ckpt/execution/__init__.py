"""One run of a plan, from its check to its result: what all commands and jobs do."""
