"""What each command does; `sfwatch.cli` has their options and exit statuses."""
