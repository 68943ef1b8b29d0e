"""sfwatch: drop JSONL batch files into a folder; they are checked, uploaded, recorded and filed away."""

__version__ = "0.1.0"
