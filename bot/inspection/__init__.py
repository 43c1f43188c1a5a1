"""Looking into soft prompts, which nobody can read: what a version's virtual tokens are like, and how two versions differ."""
