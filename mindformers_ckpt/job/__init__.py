"""What the ranks of a job do together."""

MAIN_RANK = 0  # the rank that clears, merges, leads and publishes
