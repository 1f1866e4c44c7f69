"""`python -m syncbn bench`: what syncbn costs, beside its peers."""
