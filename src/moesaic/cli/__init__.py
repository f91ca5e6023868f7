"""The command line: one file a verb, or a family's verbs. `main` finds them; it knows none by name."""
