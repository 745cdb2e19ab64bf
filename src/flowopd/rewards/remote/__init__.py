"""Rewards on another machine, and rewards for other machines."""
