"""Which kernel multiplies rows by a weight on this CPU: candidates, measuring, stored choices."""
