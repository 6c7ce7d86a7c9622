"""What people read: tables, comparisons, rules to paste."""
