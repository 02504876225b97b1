"""Training: loss → optimizer → step (pure) → loop (effects) · checkpoint · metrics."""
