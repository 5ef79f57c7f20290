"""Jobs: requested, run one at a time, turned into versions, judged, and promoted or not."""
