"""A small corpus made by arithmetic: sounds and music anyone can tell apart, spoken sentences, and words for all.

It is written in the published layouts of the corpora, so that the demo travels the same road as real recordings:

    wavcaps/      most sounds, captioned in many wordings; some wordings occur in the test split only
    audioset/     more of the sounds, with labels but no captions
    audiocaps/    more of the sounds, with captions but no labels; several captions per held-out clip
    msd/          the musical textures, with tags
    ljspeech/     short sentences by one voice        gigaspeech/   long recordings of several voices, in segments

A sound varies in pitch, tempo, loudness and onset. Pitch and tempo are told in the captions; loudness is not,
since every clip is brought to the same level. Spoken sentences need espeak-ng (extra `speech`).
"""
