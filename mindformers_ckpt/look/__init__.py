"""What is there, and what was done: a checkpoint as arrays, inspect, show, doctor."""
