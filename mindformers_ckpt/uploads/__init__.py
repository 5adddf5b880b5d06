"""One run of a plan whose result goes to an object storage: sent in parts, put in place at the end."""
