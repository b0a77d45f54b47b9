"""From a configuration to what a run trains, and how."""
