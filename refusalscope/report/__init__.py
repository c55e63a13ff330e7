"""What a run folder says to a reader: figures and one page."""
