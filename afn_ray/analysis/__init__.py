"""Questions to finished runs. In: a run. Out: an audit, claims, a verification, an explanation."""
