"""What results are compared with: dense attention and dense networks in float64, and identities."""
