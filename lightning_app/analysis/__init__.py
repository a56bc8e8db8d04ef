"""What runs and networks show: the gates, figures, and runs beside each other."""
