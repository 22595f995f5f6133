"""What everything stands on: values (kernel), rows (store), shapes between processes (wire)."""
