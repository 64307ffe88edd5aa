"""What surrounds a run: undoing, progress, sharing among processes, going on after a crash, fingerprints."""
