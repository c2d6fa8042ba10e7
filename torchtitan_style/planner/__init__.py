"""What a configuration will take, by arithmetic, before it is run."""
