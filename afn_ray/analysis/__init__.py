"""Questions to finished runs: a run in; an audit, claims, a verification or an explanation out."""
