"""How each engine is launched, and the supervisor that keeps the processes alive."""
