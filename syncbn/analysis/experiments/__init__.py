"""The experiments behind the claims, one a file: `run(settings)` gives claims, notes, and a picture."""
