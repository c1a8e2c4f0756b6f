"""What tokens cost: the ledger of usage, the cost model of the rig, and commercial prices beside it."""
