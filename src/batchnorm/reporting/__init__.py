"""The look that every report shares: figures and pages."""
