"""Records to Batches.

conversation: turns → token ids and the assistant mask · images: file → pixels ·
rows: ids + visuals → one Batch row · records: the prepared dataset on disk ·
pipeline: records → shuffled, sharded, batched rows.
"""
