"""Many networks trained at once: padding to one shape, the vmapped step, and how many to stack."""
