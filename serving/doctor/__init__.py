"""Whether this machine has what a rig needs: what is wrong, how to mend it, and what could not be checked."""
