"""What the operator's port shows: its pages and how several workers' answers become one."""
