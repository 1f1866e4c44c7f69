"""Whether synchronized batch norm works on these machines, what it costs there, and what to do about what is amiss."""
