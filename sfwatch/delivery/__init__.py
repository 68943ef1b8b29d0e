"""One file from claim to done: its states, attempts, look-ups, claims and what is written down of them."""
