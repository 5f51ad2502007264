"""Learning from preferences: DPO, ORPO and KTO as another kind of rows and loss in the step of supervised training."""
