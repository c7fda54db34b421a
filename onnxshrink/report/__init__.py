"""What people see of a report."""
