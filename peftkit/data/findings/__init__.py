"""What the audit looks for in rows: one table of rules, one file for each family of checks."""
