"""What every other part uses: errors for people, files that are complete or absent, signals, the Hub."""
