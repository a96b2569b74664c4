"""What run folders tell afterwards: read, compared and drawn."""
