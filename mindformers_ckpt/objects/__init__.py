"""Object storage (S3, and OBS, which speaks it) as paths: listed, read by ranges, written in parts."""
