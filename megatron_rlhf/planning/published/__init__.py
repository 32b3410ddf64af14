"""What others have measured, and the planner's figures for the same runs."""
