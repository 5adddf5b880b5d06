"""Results come into being whole: written aside, described by a manifest, put in place in one step."""
