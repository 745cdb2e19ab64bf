"""What several processes need."""
