"""Arrays of any modality: videos, spectrograms, depth maps, point clouds, images and bytes.

``dataset`` has the config, ``sources`` what is read from files, ``generated`` what is computed from
an index, ``names`` what modalities may be called.
"""
