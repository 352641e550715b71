"""The whole of Shearling in minutes on a laptop's CPU, from text that every Python brings along."""
