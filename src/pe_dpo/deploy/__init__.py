"""From a run to something that serves: merged, verified, exported, and talked to."""
