"""The papers' comparison in miniature: every method on a task whose reward is known."""
