"""What several ideas stand on."""
