"""What programs call: paths in, a plan or a report out. The command line is a skin over it."""
