"""Where weights come from, and how they are prepared for the rig they run on."""
