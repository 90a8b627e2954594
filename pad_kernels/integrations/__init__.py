"""Other libraries' models and trainers on top of this one; the core never imports these."""
